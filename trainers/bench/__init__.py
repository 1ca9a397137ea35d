"""Benchmarks: ``cases`` reads them, ``make`` composes, ``score`` judges, ``aggregates`` and ``report`` summarise."""
