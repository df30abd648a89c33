"""joblib, and with it scikit-learn, on the nodes of the job: `register_ray()`, then `joblib.parallel_config("ray")`."""

from __future__ import annotations

__all__ = ["register_ray"]


def register_ray() -> None:
    """Make joblib's backend "ray" this job.

    Raises:
        ImportError: There is no joblib, or one older than 1.3.
    """
    from hpcray.util.joblib.ray_backend import register

    register()
