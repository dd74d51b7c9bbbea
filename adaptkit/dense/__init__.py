"""Dense measures of a frozen backbone: what its patch tokens know, pixel by pixel."""
