"""The example of unidist's README, with Ray as its backend."""

import unidist
import unidist.config as cfg

cfg.Backend.put("ray")
unidist.init()


@unidist.remote
def square(x):
    return x * x


@unidist.remote
class Cube:
    def __init__(self):
        self.volume = None

    def compute_volume(self, square):
        self.volume = square**3

    def read(self):
        return self.volume


square_refs = [square.remote(i) for i in range(4)]
print(unidist.get(square_refs))
cubes = [Cube.remote() for _ in range(len(square_refs))]
for cube, square_ref in zip(cubes, square_refs, strict=True):
    cube.compute_volume.remote(square_ref)
print(unidist.get([cube.read.remote() for cube in cubes]))
ready, rest = unidist.wait(square_refs, num_returns=2)
print(len(ready), len(rest), unidist.num_cpus() > 0, unidist.get(unidist.put("kept")))
unidist.shutdown()
