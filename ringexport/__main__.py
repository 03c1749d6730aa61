"""``python -m ringexport``."""

from ringexport.cli.main import main

if __name__ == "__main__":
    main()
