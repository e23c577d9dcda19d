"""``python -m refinedet``, which is also what ``torchrun -m refinedet train ...`` starts."""

from refinedet.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
