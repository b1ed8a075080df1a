"""The probe stage as a program."""

from saejax.experiments import binary

main = binary("probe")

if __name__ == "__main__":
    main()
