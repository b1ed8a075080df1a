"""The atlas stage as a program."""

from saejax.experiments import binary

main = binary("atlas")

if __name__ == "__main__":
    main()
