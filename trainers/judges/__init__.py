"""Judges of composed pictures: pure functions of arrays, tested with known answers.

``placement``, ``appearance`` and ``identity`` measure; ``panel`` lists the judges and applies them to a case;
``statistics`` has the bootstrap, ``retention`` compares two systems; ``summary``, ``comparison`` and ``drawings`` show
the result; ``scene_plan`` lists the scenes, ``measure`` runs an evaluation.
"""
