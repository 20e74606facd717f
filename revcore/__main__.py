"""``python -m revcore``."""

from __future__ import annotations

from revcore.cli import main

if __name__ == "__main__":
    main()
