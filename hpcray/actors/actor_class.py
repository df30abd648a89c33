"""`@hpcray.remote` on a class."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from hpcray import ids
from hpcray.actors.handle import ActorHandle, ClassDescription
from hpcray.client import Client, require_client
from hpcray.options import actor_template, check_actor_options
from hpcray.protocol import messages as m
from hpcray.runtime_context import Surroundings, surroundings
from hpcray.worker.arguments import pack_arguments
from hpcray.worker.functions import export, template_id
from hpcray.worker.inspection import explain
from hpcray.worker.serialization import pickle_value


class ActorClass:
    """A class whose `.remote()` creates an actor: an instance in a worker process of its own."""

    def __init__(self, user_class: type, options: Mapping[str, Any]) -> None:
        self._class = user_class
        self._options = dict(options)
        self._description = ClassDescription.of(user_class)
        self._exported: tuple[Client, Surroundings, bytes] | None = None
        self.__doc__ = user_class.__doc__
        self.__name__ = user_class.__name__
        self.__module__ = user_class.__module__

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        name = self._description.name
        raise TypeError(f"Actors cannot be instantiated directly. Instead of '{name}()', use '{name}.remote()'.")

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        raise TypeError(
            f"{self._description.name} is an actor class and cannot be inherited from: derive from the plain "
            "class, then decorate the result"
        )

    def remote(self, *args: Any, **kwargs: Any) -> ActorHandle:
        """Create the actor. Does not wait for it: calls made meanwhile run when `__init__` has returned.

        Raises:
            TypeError: The arguments do not fit `__init__`, or something cannot be pickled.
            ActorAlreadyExistsError: The name is taken.
            ValueError: Its placement group has no such bundle, or none that is large enough; or its runtime environment is too
                large.
            OSError: A file of its runtime environment cannot be read.
        """
        client = require_client()
        options = self._options
        name = options.get("name") or ""
        namespace = options.get("namespace") or client.namespace
        if name and options.get("get_if_exists"):
            from hpcray.api import get_actor

            try:
                return get_actor(name, namespace)
            except ValueError:
                pass  # none yet: create it
        if (init := self._description.methods.get("__init__")) is not None and init[0] is not None:
            init[0].bind(*args, **kwargs)
        elif args or kwargs:
            raise TypeError(f"{self._description.name}() takes no arguments")
        around = surroundings()
        if self._exported is None or self._exported[0] is not client or self._exported[1] != around:
            self._exported = (client, around, self._export(client, around))
        packed = pack_arguments(client, f"{self._description.name}.__init__", args, kwargs)
        actor = client.new_task_id()
        handle_id = ids.object_id(actor, 0)
        if name:
            blob = pickle_value((actor, self._description))[0]
            client.query("claim_name", [namespace, name, actor, blob])
        message = m.CreateActor(
            actor,
            self._exported[2],
            packed.data,
            packed.dependencies,
            packed.nested,
            name,
            namespace,
            options.get("lifetime") == "detached",
        )
        return ActorHandle(client.submit(message, [handle_id])[0], self._description)

    def options(self, **options: Any) -> ActorClass:
        """The same class with other options; this one stays as it is.

        Raises:
            ValueError: An unknown option or impossible value.
            TypeError: A value of a wrong type.
        """
        return ActorClass(self._class, {**self._options, **check_actor_options(options)})

    def _export(self, client: Client, around: Surroundings) -> bytes:
        name = self._description.name
        try:
            identifier, blob = export(self._class)
        except Exception as error:
            raise TypeError(f"could not serialize the actor class {name}: {explain(self._class, error)}") from error
        client.define(identifier, blob)
        environment = client.environments.choose(client, self._options.get("runtime_env"))
        template = actor_template(client.job_definition, identifier, name, self._options, environment, around)
        template_name = template_id(template)
        client.define_template(template_name, template)
        return template_name

    def __reduce__(self) -> Any:
        return ActorClass, (self._class, self._options)

    def __repr__(self) -> str:
        return f"<actor class {self._description.name}>"


def method(*, num_returns: int = 1) -> Any:
    """Decorate an actor's method with options of its calls.

    Raises:
        ValueError: `num_returns` is negative.
    """
    if num_returns < 0:
        raise ValueError(f"num_returns must be zero or more, not {num_returns}")

    def decorate(function: Any) -> Any:
        if not inspect.isfunction(function):
            raise TypeError("@hpcray.method decorates functions in the body of a class")
        function.__hpcray_num_returns__ = num_returns  # type: ignore[attr-defined]
        return function

    return decorate
