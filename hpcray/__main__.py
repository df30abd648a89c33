"""``python -m hpcray``: one rank under mpirun or srun, or what the `hpcray` command does."""

from hpcray.launcher.cli import main_module

if __name__ == "__main__":
    main_module()
