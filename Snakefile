import gc
import shlex
import sys
from pathlib import Path

from snakemake.utils import Paramspace, min_version

from peftscope.layout import sources
from peftscope.planning.demands import JobDemands
from peftscope.sizing.grid import grid
from peftscope.planning.plan import load_workflow
from peftscope.planning.sweep import ROUNDS
from peftscope.spec import RUN_ID_PATTERN

min_version("9.0")
# A plan of many jobs is millions of objects that stay: looking for garbage among them took a fifth of a dry run.
gc.set_threshold(200_000)
# The jobs use the Python that Snakemake itself runs on, whatever PATH says. They are its own children (exec), and die
# with it: those of a workflow that was killed must not write beside those of the next one. The prefix is also that of a
# workflow that uses this one as a module, whose commands may be several: there it ends without exec.
shell.prefix(
    f"set -euo pipefail; export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH PEFTSCOPE_DIES_WITH_PARENT=1; "
    + ("exec " if workflow.modifier.is_main_snakefile() else "")
)

WORKFLOW = load_workflow(
    config, None if workflow.remote_exec else workflow.resource_settings.cores
)
DEMANDS = JobDemands(WORKFLOW)
GRID = Paramspace(grid())
CALCULATOR = sources("memory/**/*.py", "sizing/*.py", "methods/**/*.py")
TUNING = sources("analysis/tuning.py")
ANALYSIS = sources("analysis/*.py", "planning/published.py")
REPORT = sources("report/*.py", "report/templates/*")


wildcard_constraints:
    experiment=r"[a-z0-9-]+",
    run_id=RUN_ID_PATTERN,
    model=r"[^/]+",
    task=r"[^/]+",
    benchmark=r"[^/]+",
    round=r"[0-9]",


# On a cluster, rules with `localrule` stay where Snakemake runs: they are short, or need the network that nodes may not have.
rule all:
    input:
        expand("results/{experiment}/all-runs-ended-well", experiment=WORKFLOW.plans),
    localrule: True


rule fetch_model:
    output:
        "resources/models/{model}/manifest.json",
    log:
        "resources/models/{model}.log",
    benchmark:
        "resources/models/{model}.benchmark.tsv"
    localrule: True
    params:
        name=WORKFLOW.model_name,
        revision=WORKFLOW.model_revision,
    shell:
        "python -m peftscope fetch {params.name:q} {params.revision} 2>&1 | tee {log:q}"


rule make_task:
    output:
        "resources/tasks/{task}/manifest.json",
    log:
        "resources/tasks/{task}.log",
    benchmark:
        "resources/tasks/{task}.benchmark.tsv"
    localrule: True
    shell:
        "python -m peftscope make-task {wildcards.task:q} > {log:q} 2>&1"


rule make_benchmark:
    output:
        "resources/benchmarks/{benchmark}/manifest.json",
    log:
        "resources/benchmarks/{benchmark}.log",
    localrule: True
    shell:
        "python -m peftscope make-benchmark {wildcards.benchmark:q} > {log} 2>&1"


rule train:
    input:
        # A model that is fetched again is the same model: its date must not make finished runs old.
        ancient(WORKFLOW.needed),
    output:
        spec="results/runs/{run_id}/spec.json",
        record="results/runs/{run_id}/record.json",
    log:
        "results/runs/{run_id}/train.log",
    benchmark:
        "results/runs/{run_id}/train.tsv"
    # For jobs that are killed from outside; whatever else happens in a run is a status in its record.
    retries: 2
    threads: WORKFLOW.threads
    resources:
        gpu=WORKFLOW.gpus,
        mem_mb=DEMANDS.memory_mb,
        runtime=DEMANDS.minutes,
        # Profiles change these three: seconds between checkpoints, whether another attempt has more memory, and which
        # trained weights stay (all, adapters or none).
        checkpoint_seconds=300,
        attempts_left=0,
        keep_weights="adapters",
        # The cores for a run that is timed while others on this machine wait.
        timed_threads=WORKFLOW.timed_threads,
    params:
        spec=WORKFLOW.spec_json,
        options=WORKFLOW.options,
    shell:
        "python -m peftscope run {params.spec:q} --threads {threads} --timed-threads {resources.timed_threads} --output $(dirname {output.record:q}) --checkpoint-seconds {resources.checkpoint_seconds} --attempts-left {resources.attempts_left} --keep-weights {resources.keep_weights} {params.options} > {log} 2>&1"


# The learning rates of a study's arms: three around the best listed one, then up to twice one more beyond an end.
checkpoint rates:
    input:
        WORKFLOW.rate_records(checkpoints),
        WORKFLOW.experiment_file,
        TUNING,
    output:
        "results/{experiment}/rates-{round}.json",
    log:
        "results/{experiment}/logs/rates-{round}.log",
    localrule: True
    shell:
        "python -m peftscope tune {wildcards.experiment} {wildcards.round} 2>&1 | tee {log}"


checkpoint tune:
    input:
        WORKFLOW.rate_records(checkpoints),
        WORKFLOW.experiment_file,
        TUNING,
    output:
        "results/{experiment}/tuned.json",
    log:
        "results/{experiment}/logs/tune.log",
    localrule: True
    params:
        round=ROUNDS,
    shell:
        "python -m peftscope tune {wildcards.experiment} {params.round} 2>&1 | tee {log}"


rule collect:
    input:
        WORKFLOW.records(checkpoints),
        WORKFLOW.experiment_file,
        ANALYSIS,
    output:
        runs="results/{experiment}/runs.csv",
        losses="results/{experiment}/losses.csv",
    log:
        "results/{experiment}/logs/collect.log",
    benchmark:
        "results/{experiment}/benchmarks/collect.tsv"
    localrule: True
    shell:
        "python -m peftscope collect {wildcards.experiment} > {log} 2>&1"


# Only experiments that keep weights along the training have this.
rule measure:
    input:
        # A run that is trained again has the same weights.
        ancient("results/runs/{run_id}/record.json"),
    output:
        "results/runs/{run_id}/weights.csv",
    log:
        "results/runs/{run_id}/measure.log",
    benchmark:
        "results/runs/{run_id}/measure.tsv"
    resources:
        mem_mb=4000,
    shell:
        "python -m peftscope measure {wildcards.run_id} > {log} 2>&1"


# What follows from the code alone is made once for all experiments.
rule memory_curve:
    input:
        CALCULATOR,
    output:
        f"results/memory/curves/{GRID.wildcard_pattern}.csv",
    log:
        f"results/memory/logs/curve-{GRID.wildcard_pattern}.log",
    localrule: True
    shell:
        "python -m peftscope memory-curve {wildcards.method} {wildcards.axis} > {output} 2> {log}"


rule memory_figures:
    input:
        curves=expand("results/memory/curves/{point}.csv", point=GRID.instance_patterns),
        code=REPORT,
    output:
        report(
            "results/memory/grid.svg",
            category="Memory",
            labels={"figure": "over rank, length, batch and method"},
        ),
        report(
            "results/memory/bars.svg",
            category="Memory",
            labels={"figure": "7B to 70B"},
        ),
    log:
        "results/memory/logs/figures.log",
    localrule: True
    shell:
        "python -m peftscope memory-figures {input.curves} > {log} 2>&1"


# Tables and figures differ from one experiment to the next: src/peftscope/report/parts.py lists them.
rule report:
    input:
        "results/{experiment}/runs.csv",
        "results/{experiment}/losses.csv",
        WORKFLOW.tuned,
        WORKFLOW.measured(checkpoints),
        rules.memory_figures.output,
        ANALYSIS,
        REPORT,
    output:
        "reports/{experiment}/report.html",
        report(
            directory("results/{experiment}/tables"),
            patterns=["{part}.html"],
            category="Tables",
            labels={"experiment": "{experiment}", "table": "{part}"},
        ),
        report(
            directory("results/{experiment}/figures"),
            patterns=["{part}.svg"],
            category="Figures",
            labels={"experiment": "{experiment}", "figure": "{part}"},
        ),
    log:
        "results/{experiment}/logs/report.log",
    benchmark:
        "results/{experiment}/benchmarks/report.tsv"
    localrule: True
    shell:
        "python -m peftscope page {wildcards.experiment} > {log} 2>&1"


rule check:
    input:
        "results/{experiment}/runs.csv",
        "reports/{experiment}/report.html",
    output:
        touch("results/{experiment}/all-runs-ended-well"),
    log:
        "results/{experiment}/logs/check.log",
    localrule: True
    shell:
        "python -m peftscope check {wildcards.experiment} 2>&1 | tee {log}"
