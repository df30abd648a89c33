"""What Ray has in `ray.actor`: the classes behind `@hpcray.remote` on a class."""

from __future__ import annotations

from hpcray.actors.actor_class import ActorClass
from hpcray.actors.handle import ActorHandle, ActorMethod

__all__ = ["ActorClass", "ActorHandle", "ActorMethod"]
