"""The ablate stage as a program."""

from saejax.experiments import binary

main = binary("ablate")

if __name__ == "__main__":
    main()
