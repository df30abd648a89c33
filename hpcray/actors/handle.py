"""Actor handles: what a caller holds of an actor."""

from __future__ import annotations

import inspect
from typing import Any

from hpcray import ids
from hpcray.client import Client, require_client
from hpcray.object_ref import ObjectRef
from hpcray.options import check_method_options
from hpcray.protocol import messages as m
from hpcray.worker.arguments import pack_arguments


class ClassDescription:
    """What a handle knows of its class: name, methods, numbers of returns. Travels with handles."""

    __slots__ = ("methods", "name")

    def __init__(self, name: str, methods: dict[str, tuple[inspect.Signature | None, int]]) -> None:
        self.name = name
        self.methods = methods

    @classmethod
    def of(cls, user_class: type) -> ClassDescription:
        """Describe a class: all its callables, inherited, static and class methods too."""
        methods: dict[str, tuple[inspect.Signature | None, int]] = {}
        for name in dir(user_class):
            member = inspect.getattr_static(user_class, name)
            is_bound = isinstance(member, (staticmethod, classmethod))
            function = member.__func__ if is_bound else member
            if not inspect.isfunction(function):
                continue
            signature = inspect.signature(function)
            if not isinstance(member, staticmethod):
                parameters = list(signature.parameters.values())
                is_first_positional = parameters and parameters[0].kind in (
                    inspect.Parameter.POSITIONAL_ONLY,
                    inspect.Parameter.POSITIONAL_OR_KEYWORD,
                )
                if is_first_positional:
                    signature = signature.replace(parameters=parameters[1:])
            bare = [
                parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()
            ]
            # Defaults stay in the class: here only which parameters have one matters, and their values may
            # not pickle.
            plain = [p if p.default is p.empty else p.replace(default=None) for p in bare]
            signature = signature.replace(parameters=plain, return_annotation=inspect.Signature.empty)
            methods[name] = (signature, getattr(function, "__hpcray_num_returns__", 1))
        return cls(name=user_class.__name__, methods=methods)

    def __reduce__(self) -> Any:
        return ClassDescription, (self.name, self.methods)


class ActorHandle:
    """A handle of an actor. The actor ends when the last one is gone, unless it is detached.

    Compares and hashes by the actor's id; may be passed to tasks and other actors and stored in objects.
    """

    def __init__(self, ref: ObjectRef[Any], description: ClassDescription) -> None:
        self._ref = ref
        self._actor = ids.task_of(ref.binary())
        self._actor_id = ids.shown_actor(self._actor)
        self._class = description
        if ref._client is not None:
            # The actor's process ends with the last handle, not with the next thing that this process does.
            ref._client.release_at_once(ref.binary())

    @classmethod
    def adopt(cls, actor: bytes, description: ClassDescription) -> ActorHandle:
        """A handle of an actor that is known to live, such as the one that this process is."""
        return cls(require_client().adopt(ids.object_id(actor, 0)), description)

    def __getattr__(self, name: str) -> ActorMethod:
        description = self.__dict__.get("_class")
        if description is not None and name in description.methods:
            signature, num_returns = description.methods[name]
            return ActorMethod(self, name, signature, num_returns)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._class.methods})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ActorHandle) and other._actor == self._actor

    def __hash__(self) -> int:
        return hash(self._actor)

    def __repr__(self) -> str:
        return f"Actor({self._class.name}, {self._actor_id.hex()})"

    def __reduce__(self) -> Any:
        return ActorHandle, (self._ref, self._class)


class ActorMethod:
    """One method of one actor."""

    __slots__ = ("_handle", "_name", "_num_returns", "_signature")

    def __init__(self, handle: ActorHandle, name: str, signature: inspect.Signature | None, num_returns: int) -> None:
        self._handle = handle
        self._name = name
        self._signature = signature
        self._num_returns = num_returns

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(
            f"Actor methods cannot be called directly. Instead of running 'object.{self._name}()', "
            f"try 'object.{self._name}.remote()'."
        )

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method. Blocks only to store large arguments; calls of one caller run in its order.

        Returns:
            An `ObjectRef`; a list of them for `num_returns` > 1; None for 0.

        Raises:
            TypeError: The arguments do not fit the method, or cannot be pickled.
        """
        client: Client = require_client()
        if self._signature is not None and (args or kwargs or self._signature.parameters):
            self._signature.bind(*args, **kwargs)
        handle = self._handle
        packed = pack_arguments(client, self._name, args, kwargs)
        task = client.new_task_id()
        returns = [ids.object_id(task, index) for index in range(1, self._num_returns + 1)]
        message = m.Call(
            task,
            handle._actor,
            self._name,
            packed.data,
            packed.dependencies,
            packed.nested,
            self._num_returns,
        )
        refs = client.submit(message, returns)
        return refs[0] if self._num_returns == 1 else refs or None

    def options(self, **options: Any) -> ActorMethod:
        """The same method with another number of returns.

        Raises:
            TypeError: An unknown option.
        """
        check_method_options(options)
        returns = options.get("num_returns")
        return ActorMethod(self._handle, self._name, self._signature, self._num_returns if returns is None else returns)
