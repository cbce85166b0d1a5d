"""`python -m property_tests.mutants`."""

# Processes that run mutants import this module again, and nothing else of the command.
if __name__ == "__main__":
    from property_tests.mutants.command import main

    main(prog_name="python -m property_tests.mutants")
