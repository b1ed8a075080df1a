"""The report stage as a program."""

from saejax.experiments import binary

main = binary("report")

if __name__ == "__main__":
    main()
