"""The patch stage as a program."""

from saejax.experiments import binary

main = binary("patch")

if __name__ == "__main__":
    main()
