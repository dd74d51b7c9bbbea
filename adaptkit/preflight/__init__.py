"""The preflight: what would spoil a run, before it begins. Nothing is written."""

from adaptkit.preflight.story import CheckResult as CheckResult
from adaptkit.preflight.story import check as check
from adaptkit.preflight.story import check_recipe as check_recipe
