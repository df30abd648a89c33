"""What of a raylet's resources is free, and who has the rest: its own account, and one for each bundle set aside here.

A worker that blocks gives its CPUs back and takes them again when it goes on, whether or not they are free then: so
`free` may be negative for a while, and nothing new starts until it no longer is (Ray's rule for nested tasks).

Rules:
  1. In each account, total = free + Σ what its holdings have, per resource; likewise for each unit (GPU).
  2. A bundle is a holding of the raylet's own account, and an account to those who run in it.
  3. A bundle that is given up takes nobody in, and goes back to the raylet when the last holding in it does, paused or not.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from hpcray.exceptions import InternalError
from hpcray.protocol.messages import Template
from hpcray.resources import Shape, Units, choose_units, slots, whole_units


class Holding:
    """Resources that somebody has of an account, until `Ledger.release`."""

    __slots__ = ("account", "is_paused", "shape", "units")

    def __init__(self, account: Account, shape: Shape, units: Units) -> None:
        self.account = account
        self.shape = shape
        self.units = units
        """Per resource in units, how much of which."""
        self.is_paused = False
        """Its CPUs are given back for as long as its worker is blocked."""


class Account:
    """Resources that are taken and given back, in units of 1/10,000.

    Args:
        total: All there is.
        units: Of the resources that come in units, which there are and how much of each.
    """

    __slots__ = ("free", "free_units", "holdings", "total", "units")

    def __init__(self, total: Mapping[str, int], units: Mapping[str, Mapping[int, int]]) -> None:
        self.total: Shape = dict(total)
        self.free: Shape = dict(total)
        self.holdings = 0
        """How many there are, those included that have nothing or have given their CPUs back."""
        self.units: Units = {name: dict(each) for name, each in units.items()}
        self.free_units: Units = {name: dict(each) for name, each in units.items()}

    def slots(self, shape: Shape) -> int:
        """How many such demands can be met now."""
        return slots(self.free, shape, self.free_units)

    def could_fit(self, shape: Shape) -> bool:
        """Whether the demand could be met if nobody else had anything."""
        return slots(self.total, shape, self.units) > 0

    def is_overdrawn(self, shape: Shape) -> bool:
        """Whether workers that went on after having been blocked use more of what this needs than there is."""
        free = self.free
        return any(free.get(name, 0) < 0 for name in shape)

    def take(self, shape: Shape) -> Holding:
        """Take a demand for which there is a slot."""
        self.holdings += 1
        taken: Units = {}
        for name, amount in shape.items():
            self.free[name] -= amount
            if (free := self.free_units.get(name)) is not None:
                taken[name] = choose_units(free, amount)
                for number, part in taken[name].items():
                    free[number] -= part
        return Holding(self, shape, taken)

    def give_back(self, holding: Holding) -> None:
        """What `take` took.

        Raises:
            InternalError: More would be free than there is.
        """
        self.holdings -= 1
        for name, amount in holding.shape.items():
            if not (holding.is_paused and name == "CPU"):
                self._add(name, amount)
        for name, parts in holding.units.items():
            for number, part in parts.items():
                self.free_units[name][number] += part

    def pause(self, holding: Holding) -> None:
        holding.is_paused = True
        if cpus := holding.shape.get("CPU"):
            self._add("CPU", cpus)

    def resume(self, holding: Holding) -> None:
        holding.is_paused = False
        if cpus := holding.shape.get("CPU"):
            self.free["CPU"] -= cpus

    def _add(self, name: str, amount: int) -> None:
        self.free[name] += amount
        if self.free[name] > self.total[name]:
            raise InternalError(f"more {name} is free than there is: {self.free} of {self.total}")


class Bundle(Account):
    """A part of a raylet's resources that a placement group has set aside."""

    __slots__ = ("holding",)

    def __init__(self, holding: Holding) -> None:
        units = {name: dict.fromkeys(parts, 0) | parts for name, parts in holding.units.items()}
        super().__init__(holding.shape, units)
        self.holding = holding


class Ledger:
    """All accounts of one raylet.

    Args:
        total: What the raylet offers.
    """

    def __init__(self, total: Mapping[str, int]) -> None:
        self._own = Account(total, whole_units(total))
        self.groups: dict[bytes, dict[int, Bundle]] = {}
        """Per placement group, its bundles here by their index."""
        self._leaving: set[Bundle] = set()
        self.total = self._own.total
        self.free = self._own.free
        self.free_units = self._own.free_units

    def _accounts(self, template: Template) -> Iterator[Account]:
        if not template.group:
            yield self._own
        elif bundles := self.groups.get(template.group):
            if template.bundle < 0:
                yield from bundles.values()
            elif template.bundle in bundles:
                yield bundles[template.bundle]

    # ----------------------------------------------------------------------------------------------- demands of a class
    def slots(self, template: Template) -> int:
        """How many of the class can be given its resources now."""
        if not template.group:
            return self._own.slots(template.resources)
        return min(1 << 30, sum(account.slots(template.resources) for account in self._accounts(template)))

    def could_fit(self, template: Template) -> bool:
        """Whether one of the class could be given its resources if nothing else ran."""
        return any(account.could_fit(template.resources) for account in self._accounts(template))

    def is_overdrawn(self, template: Template) -> bool:
        """Whether workers that went on after having been blocked use more of what the class needs than there is."""
        return any(account.is_overdrawn(template.resources) for account in self._accounts(template))

    def acquire(self, template: Template) -> Holding:
        """The resources of one of a class that has a slot; of several bundles, the fullest that has room."""
        shape = template.resources
        fitting = [account for account in self._accounts(template) if account.slots(shape)]
        return min(fitting, key=lambda account: account.slots(shape)).take(shape)

    def release(self, holding: Holding) -> None:
        """Give back what was acquired.

        Raises:
            InternalError: More would be free than there is.
        """
        holding.account.give_back(holding)
        if holding.account in self._leaving:
            self._end_if_unused(holding.account)

    def pause(self, holding: Holding) -> None:
        """Its worker is blocked: its CPUs are free meanwhile."""
        holding.account.pause(holding)

    def resume(self, holding: Holding) -> None:
        """Its worker goes on, whether or not there are CPUs."""
        holding.account.resume(holding)

    # ---------------------------------------------------------------------------------------------------------- bundles
    def reserve(self, group: bytes, bundles: Mapping[int, Shape]) -> bool:
        """Set bundles aside, all or none; False: there is no room for all of them now."""
        reserved: dict[int, Bundle] = {}
        for index, shape in bundles.items():
            if not self._own.slots(shape):
                for bundle in reserved.values():
                    self._own.give_back(bundle.holding)
                return False
            reserved[index] = Bundle(self._own.take(shape))
        self.groups.setdefault(group, {}).update(reserved)
        return True

    def give_up(self, group: bytes, indices: Collection[int]) -> Sequence[Account]:
        """Bundles (none named: all of the group) take nobody in any more, and go back when those who are in them have gone."""
        bundles = self.groups.get(group, {})
        given_up = [bundles.pop(index) for index in list(bundles) if index in indices or not indices]
        if not bundles:
            self.groups.pop(group, None)
        for bundle in given_up:
            self._leaving.add(bundle)
            self._end_if_unused(bundle)
        return given_up

    def _end_if_unused(self, account: Account) -> None:
        assert isinstance(account, Bundle)
        if not account.holdings:
            self._leaving.discard(account)
            self._own.give_back(account.holding)

    # ----------------------------------------------------------------------------------------------------------- checks
    def check(self, holdings: Collection[Holding]) -> None:
        """Raise InternalError if the accounts and what is held disagree."""
        bundles = [bundle for group in self.groups.values() for bundle in group.values()] + list(self._leaving)
        of_account: dict[Account, list[Holding]] = {account: [] for account in [self._own, *bundles]}
        of_account[self._own] += [bundle.holding for bundle in bundles]
        for holding in holdings:
            if holding.account not in of_account:
                raise InternalError(f"somebody has {holding.shape} of a bundle that went back")
            of_account[holding.account].append(holding)
        for account, held in of_account.items():
            free = dict(account.free)
            free_units = {name: dict(each) for name, each in account.free_units.items()}
            for holding in held:
                for name, amount in holding.shape.items():
                    free[name] += 0 if holding.is_paused and name == "CPU" else amount
                for name, parts in holding.units.items():
                    for number, part in parts.items():
                        free_units[name][number] += part
            if len(held) != account.holdings:
                raise InternalError(f"{account.holdings} holdings of an account are counted, and there are {len(held)}")
            if free != account.total or free_units != account.units:
                raise InternalError(f"{account.free} free and what is held make {free}, not {account.total}")
