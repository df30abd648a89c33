"""Patterns as git reads them: what is left out here is what `git check-ignore` said."""

import pytest

from hpcray.environments.ignore import Patterns

PATHS = [
    "a",
    "b.log",
    "build/",
    "build/x.o",
    "src/",
    "src/build/",
    "src/build/y",
    "src/a",
    "docs/",
    "docs/a.txt",
    "docs/deep/",
    "docs/deep/a.txt",
    "#x",
    "!y",
    "key[1]",
    "k1",
    "k2",
    "k3",
    "with space",
]


@pytest.mark.parametrize(
    ("lines", "left_out"),
    [
        (["*.log"], ["b.log"]),
        (["build"], ["build/", "build/x.o", "src/build/", "src/build/y"]),
        (["build/"], ["build/", "build/x.o", "src/build/", "src/build/y"]),
        (["/build"], ["build/", "build/x.o"]),
        (["src/*"], ["src/build/", "src/build/y", "src/a"]),
        (["docs/*.txt"], ["docs/a.txt"]),
        (["docs/**/a.txt"], ["docs/a.txt", "docs/deep/a.txt"]),
        (["**/a.txt"], ["docs/a.txt", "docs/deep/a.txt"]),
        (["docs/**"], ["docs/a.txt", "docs/deep/", "docs/deep/a.txt"]),
        (["a*", "!a"], ["docs/a.txt", "docs/deep/a.txt"]),
        (["*.txt", "!docs/deep/a.txt"], ["docs/a.txt"]),
        (["# remark", "", "\\#x", "\\!y"], ["#x", "!y"]),
        (["k[12]"], ["k1", "k2"]),
        (["k[!12]"], ["k3"]),
        (["key\\[1]"], ["key[1]"]),
        (["k?"], ["k1", "k2", "k3"]),
        (["with space   "], ["with space"]),
        (["!a"], []),
        (["src/**/y"], ["src/build/y"]),
        (["/"], []),
        (
            ["*"],
            PATHS,
        ),
    ],
)
def test_what_is_left_out(lines, left_out):
    patterns = Patterns(lines)

    def is_ignored(path: str) -> bool:
        # What lies in a directory that is left out is never looked at.
        *above, _ = path.rstrip("/").split("/")
        parents = ["/".join(above[: count + 1]) for count in range(len(above))]
        is_dir = path.endswith("/")
        return any(patterns.match(p, is_dir=True) for p in parents) or patterns.match(path.rstrip("/"), is_dir=is_dir)

    assert [path for path in PATHS if is_ignored(path)] == left_out
