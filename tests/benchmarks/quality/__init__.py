"""How much of its experts a merge keeps: YeAM's defaults against rivals, plain and tuned. `python tests/benchmarks/quality --help`.

`texts` and `tasks` make the material, `rows` tokenises and splits it, `bases`, `tuning` and `family` make the models, `scoring` reads them,
`rivals` lists the methods, `merging` runs them, `strength` looks for their best strength, `cells` puts one comparison together, `sampling`
tells how much of it is chance, `stress` the hard ones, `report`, `table` and `picture` what comes out, `harness` repeats some of it with
lm_eval, `cache` keeps every finished step.
"""
