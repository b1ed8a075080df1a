"""The export stage as a program."""

from saejax.experiments import binary

main = binary("export")

if __name__ == "__main__":
    main()
