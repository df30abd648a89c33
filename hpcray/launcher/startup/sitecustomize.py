"""What Python runs before the script of `hpcray run --as-ray`, whose PYTHONPATH begins with this folder.

So the script itself is started as ever, and Pythons that it starts know `ray` as it does.
"""  # noqa: INP001 - found by its folder, not by a package

import importlib
import sys
from pathlib import Path

ourselves = sys.modules[__name__]
folder = str(Path(__file__).parent)
sys.path[:] = [path for path in sys.path if path != folder]

# The environment may have a module of this name, which this one hides.
del sys.modules[__name__]
try:
    importlib.import_module(__name__)
except ModuleNotFoundError as error:
    if error.name != __name__:
        raise
sys.modules.setdefault(__name__, ourselves)

try:
    from hpcray.ray_alias import install
except ModuleNotFoundError:
    pass  # another Python, whose environment has no hpcray
else:
    install()
