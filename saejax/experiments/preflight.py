"""The preflight stage as a program."""

from saejax.experiments import binary

main = binary("preflight")

if __name__ == "__main__":
    main()
