"""The train stage as a program."""

from saejax.experiments import binary

main = binary("train")

if __name__ == "__main__":
    main()
