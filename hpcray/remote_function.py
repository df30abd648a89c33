"""`@hpcray.remote` on a function."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from hpcray import ids
from hpcray.client import Client, require_client
from hpcray.object_ref import ObjectRef
from hpcray.options import check_task_options, task_template
from hpcray.protocol import messages as m
from hpcray.runtime_context import Surroundings, surroundings
from hpcray.worker.arguments import pack_arguments
from hpcray.worker.functions import export, template_id
from hpcray.worker.inspection import explain


class _Export:
    """The function's pickle at the present connection, shared by all variants of its options."""

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self._function = function
        self._name = name
        self._known: tuple[Client, bytes] | None = None

    def identifier(self, client: Client) -> bytes:
        """The id of the definition; the first call per connection sends it."""
        if self._known is None or self._known[0] is not client:
            try:
                identifier, blob = export(self._function)
            except Exception as error:
                text = f"could not serialize the function {self._name}: {explain(self._function, error)}"
                raise TypeError(text) from error
            client.define(identifier, blob)
            self._known = (client, identifier)
        return self._known[1]


class RemoteFunction:
    """A function whose `.remote()` runs it somewhere in the job and returns at once."""

    def __init__(self, function: Callable[..., Any], options: Mapping[str, Any], shared: _Export | None = None) -> None:
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise NotImplementedError(f"{function.__qualname__}: generator tasks are not supported yet")
        if inspect.iscoroutinefunction(function):
            raise ValueError(
                f"{function.__qualname__} is an async def, which cannot be a remote function: wrap it "
                "in a plain one that calls asyncio.run(), or make it a method of an actor"
            )
        self._function = function
        self._options = dict(options)
        self._name = function.__qualname__
        self._signature = inspect.signature(function)
        self._takes_nothing = not self._signature.parameters
        self._shared = shared or _Export(function, self._name)
        self._exported: tuple[Client, Surroundings, bytes, int] | None = None
        """For this connection: template id and number of returns."""
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        name = self._name
        raise TypeError(
            f"Remote functions cannot be called directly. Instead of running '{name}()', try '{name}.remote()'."
        )

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        """Run the function in the job. Blocks only to store large arguments.

        Returns:
            An `ObjectRef`; a list of them for `num_returns` > 1; None for 0.

        Raises:
            TypeError: The arguments do not fit the function, or cannot be pickled.
            ValueError: Its placement group has no such bundle, or none that is large enough; or its runtime environment is too
                large.
            OSError: A file of its runtime environment cannot be read.
        """
        client = require_client()
        exported = self._exported
        around = surroundings()
        if exported is None or exported[0] is not client or exported[1] != around:
            exported = self._exported = self._export(client, around)
        _, _, template, num_returns = exported
        if args or kwargs or not self._takes_nothing:
            self._signature.bind(*args, **kwargs)
        packed = pack_arguments(client, self._name, args, kwargs)
        task = client.new_task_id()
        returns = [ids.object_id(task, index) for index in range(1, num_returns + 1)]
        refs = client.submit(m.Submit(task, template, packed.data, packed.dependencies, packed.nested), returns)
        return refs[0] if num_returns == 1 else refs or None

    def options(self, **options: Any) -> RemoteFunctionWithOptions:
        """The same function with other options; this one stays as it is.

        Raises:
            ValueError: An unknown option or impossible value.
            TypeError: A value of a wrong type.
        """
        return RemoteFunctionWithOptions(self, {**self._options, **check_task_options(options)})

    def _export(self, client: Client, around: Surroundings) -> tuple[Client, Surroundings, bytes, int]:
        identifier = self._shared.identifier(client)
        environment = client.environments.choose(client, self._options.get("runtime_env"))
        template = task_template(client.job_definition, identifier, self._name, self._options, environment, around)
        name = template_id(template)
        client.define_template(name, template)
        return client, around, name, template.num_returns

    def __reduce__(self) -> Any:
        return _rebuild, (self._function, self._options)

    def __repr__(self) -> str:
        return f"<remote function {self._name}>"


class RemoteFunctionWithOptions:
    """What `RemoteFunction.options()` returns."""

    def __init__(self, function: RemoteFunction, options: Mapping[str, Any]) -> None:
        self._variant = RemoteFunction(function._function, options, function._shared)

    def remote(self, *args: Any, **kwargs: Any) -> ObjectRef[Any] | list[ObjectRef[Any]] | None:
        """As `RemoteFunction.remote`, with these options."""
        result: ObjectRef[Any] | list[ObjectRef[Any]] | None = self._variant.remote(*args, **kwargs)
        return result


def _rebuild(function: Callable[..., Any], options: Mapping[str, Any]) -> RemoteFunction:
    return RemoteFunction(function, options)
