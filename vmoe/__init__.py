"""vmoe: adversarially robust sparse video Mixture-of-Experts, from training to the edge."""

__version__ = "0.1.0"
