
from dataclasses import dataclass
import os, psutil
@dataclass
class Detected:
    cpus: float
    memory: int
    gpus: float
def detect(): return Detected(len(os.sched_getaffinity(0)), psutil.virtual_memory().total, 0)
def share(x): return [max(1, int(c)//len(x)) for a,c in x]
