"""Judges of composed pictures: pure functions of arrays, each tested alone with known answers.

``placement``, ``appearance`` and ``identity`` measure; ``panel`` lists the judges and applies them to a case;
``statistics`` has the bootstrap, ``ratios`` what it says of one system beside another; ``summary``, ``comparison``,
``sheet`` and ``plot`` show the result; ``measure`` runs it all.
"""
