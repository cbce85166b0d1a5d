"""Who checks the checker: faults planted one at a time, and the tests that catch them.

`python -m property_tests.mutants` plants each mutant in a copy of the project, runs the property
tests' quick profile on it in a process of its own, and prints which test killed it, and when.

Four families: `semantic`, the bugs that this field really ships, as patches; `systematic`, made of
the syntax tree of every kernel, operator and estimator; `cuda`, made of the text of the CUDA C++
kernels; `court`, tolerances and judges made too lenient, which the helpers' own tests must notice.
"""
