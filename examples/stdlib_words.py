"""Count the identifiers in every .py file of Python's standard library: a map and a tree of merges."""

import re
import sysconfig
from collections import Counter
from pathlib import Path

import hpcray

FILES_PER_TASK = 40
MERGES_PER_TASK = 4
IDENTIFIER = re.compile(r"[^\W\d]\w*")


def stdlib_files() -> list[Path]:
    stdlib = Path(sysconfig.get_path("stdlib"))
    added_by_pip = {"site-packages", "dist-packages"}
    return sorted(path for path in stdlib.rglob("*.py") if added_by_pip.isdisjoint(path.parts))


def count_words(files: list[Path]) -> Counter[str]:
    """Count the identifiers of some files; keywords and words in comments and strings count as well."""
    words: Counter[str] = Counter()
    for path in files:
        # Some of the library's own tests are files that are not UTF-8, on purpose.
        words.update(IDENTIFIER.findall(path.read_text(encoding="utf-8", errors="replace")))
    return words


@hpcray.remote
def count(files: list[Path]) -> Counter[str]:
    return count_words(files)


@hpcray.remote
def merge(*counts: Counter[str]) -> Counter[str]:
    total: Counter[str] = Counter()
    for part in counts:
        total.update(part)
    return total


def main() -> None:
    hpcray.init()
    files = stdlib_files()
    batches = [files[first : first + FILES_PER_TASK] for first in range(0, len(files), FILES_PER_TASK)]

    level = [count.remote(batch) for batch in batches]
    while len(level) > 1:
        groups = [level[first : first + MERGES_PER_TASK] for first in range(0, len(level), MERGES_PER_TASK)]
        level = [merge.remote(*group) for group in groups]
    words = hpcray.get(level[0])

    print(f"{words.total():,} words, {len(words):,} different, in {len(files):,} files; the top 20:")
    for word, times in sorted(words.items(), key=lambda item: (-item[1], item[0]))[:20]:
        print(f"{times:9,}  {word}")

    equal = words == count_words(files)
    print(f"equal to a sequential count: {'yes' if equal else 'no'}")
    if not equal:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
