"""The evaluate stage as a program."""

from saejax.experiments import binary

main = binary("evaluate")

if __name__ == "__main__":
    main()
