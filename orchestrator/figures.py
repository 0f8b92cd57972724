"Moved to learner/figures.py; to be removed when nobody imports from here."

from learner.figures import image_grid, lr_curve

__all__ = ["image_grid", "lr_curve"]
