"""The capture stage as a program."""

from saejax.experiments import binary

main = binary("capture")

if __name__ == "__main__":
    main()
