"""Views: crops in the workers, photometrics on the device."""

from adaptkit.views.multicrop import MultiCrop, Views
from adaptkit.views.photometric import photometric

__all__ = ["MultiCrop", "Views", "photometric"]
