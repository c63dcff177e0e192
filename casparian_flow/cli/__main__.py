"""`python -m casparian_flow.cli`."""

from casparian_flow.cli import main

if __name__ == "__main__":
    main()
