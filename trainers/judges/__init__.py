"""Judges of composed pictures: pure functions of arrays, each tested alone with known answers.

``placement``, ``appearance`` and ``identity`` measure; ``panel`` lists the judges and applies them to a case;
``statistics`` has the bootstrap; ``summary`` and ``sheet`` show the result.
"""
