"""The attribute stage as a program."""

from saejax.experiments import binary

main = binary("attribute")

if __name__ == "__main__":
    main()
