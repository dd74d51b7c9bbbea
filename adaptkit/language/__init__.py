"""`adaptkit codes`: what the binary language of a finished run says. Start reading at `story.py`."""

from adaptkit.language.story import Language as Language
from adaptkit.language.story import describe as describe
