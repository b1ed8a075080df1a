"""The interpret stage as a program."""

from saejax.experiments import binary

main = binary("interpret")

if __name__ == "__main__":
    main()
