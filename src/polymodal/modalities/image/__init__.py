"""Still pictures: header, pixels, tiles."""

from polymodal.modalities.image.decode import decode_image, on_white
from polymodal.modalities.image.header import ImageHeader, probe_image
from polymodal.modalities.image.reader import ImageReader, ImageReaderConfig, checked_std
from polymodal.modalities.image.resize import Fill, Fit, Resample, Rounding, filling, fit_to_canvas, normalised
from polymodal.modalities.image.tiling import Grid, closest_grid, fullest_grid

__all__ = [
    "Fill",
    "Fit",
    "Grid",
    "ImageHeader",
    "ImageReader",
    "ImageReaderConfig",
    "Resample",
    "Rounding",
    "checked_std",
    "closest_grid",
    "decode_image",
    "filling",
    "fit_to_canvas",
    "fullest_grid",
    "normalised",
    "on_white",
    "probe_image",
]
