"""The study stage as a program."""

from saejax.experiments import binary

main = binary("study")

if __name__ == "__main__":
    main()
