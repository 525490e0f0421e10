"""Constants that were fitted to measurements of the engine, in one table: nothing measures them at start-up.

All on one H100 (PCIe 5, 16 cores), PRODUCT_WAITING, ATTENTION_RATE_SHARE and those of codes on one H200. "From" names
the heading of docs/findings.md and, where raw results were kept, their file in benchmarks/results.

| constant | value, unit | measured | from |
|---|---|---|---|
| WAITING | 8 | 10 | "The planner's choice"; planner/sweep-partly.json |
| PRODUCT_WAITING | 2.75 | 1.8 to 4.2 | "Products of a few hundred rows"; products/h200.json |
| ATTENTION_RATE_SHARE | 0.93 of plain reads | 0.85 to 1.0, 109 to 438 requests | "Products of a few hundred rows" |
| PROMPT_RATE_SHARE | 0.9 of the GEMM rate | 0.93, 8,360 tokens | "Recomputing requests"; recompute/opt-13b.json |
| DECODE_RATE_SHARE | 0.3 of the memory bandwidth | 0.33 (float16), 0.45 (bfloat16) | "Coded weights" |
| CODES_RATE_SHARE | 0.9 of the memory bandwidth | 0.9 to 1.0 | "Quantised weights"; quantized/kernels.json |
| CODES_BY_COLUMN_RATE_SHARE | 0.35 of the memory bandwidth | 0.38, 0.45 | "Quantised weights" |
| FEW_ROWS_RATE_SHARE | 0.5 of the memory bandwidth | 0.49, 0.59 | "Quantised weights"; products/few-rows.json |
| LAUNCHES | 30 kernels a layer of a mini-batch | 0.3 ms where a kernel takes 10 us | "Prompts" |
| PROMPT_LAUNCHES | 90 kernels a layer of a mini-batch | 1.1 ms, a part of it once a step | "Prompts" |
| BOUNDARY_SECONDS | 1e-3 s a step | 1 ms | "The host between and inside steps" |
| REQUEST_SECONDS | 20e-6 s a request and step | 20 us | "The planner's choice" |
| HOP_SECONDS | 0.25e-3 s a layer of a mini-batch | 0.25 ms | "Mini-batches and what they cost the host" |
| CHOICE_SECONDS | 0.125e-3 s a layer of a group | 9.4 ms, all hits | "Experts on demand"; mixtures/qwen3-30b-a3b-1 |
| GRAPH_BYTES | 256 KiB a graph | assumed, not measured | |
| LOADS_BANDWIDTH | 169e9 bytes/s, all buses of a host | 55, 110, 169 GB/s of 1, 2, 4 GPUs | "Several GPUs" |
| GATHER_BANDWIDTH | 187.5e9 bytes/s from the other GPUs | whole layers at each: 250 to 320 GB/s | "Several GPUs" |
| PACKED_QUERIES | 128 queries of a request and head | assumed, not measured | |
| HANDOVER_SECONDS | 0.08e-3 s a layer of a mini-batch | 0.07 to 0.09 ms | "Mini-batches and what they cost the host" |
"""

from __future__ import annotations

CHOICE_SECONDS = 0.125e-3
"""For each layer whose experts come on demand, and each group: the device waits for the host, which learns the choice,
looks up what is missing, and launches what comes next. To be fitted: a step's time where all experts are hits, less the
time of its kernels and the boundary, over its layers."""
GRAPH_BYTES = 256 * 1024
"""Device memory that the driver takes for a graph, of which steps with experts on demand have one a layer for each
size. To be fitted: what free memory loses while these are captured, less the allocator's part, over their number."""
PACKED_QUERIES = 128
"""Queries of a request that the attention of chunks computes together: fewer take as long. To be fitted: that kernel's
time for 1 to 256 queries a request."""
WAITING = 8
"""Bus and GPU take turns with two buffers. Where they take equally long, they wait for each other: by 9 % with this
exponent, by 1 % where one takes three quarters of the other's time."""
PRODUCT_WAITING = 2.75
"""A product of some hundred rows computes for as long as it reads its weights; with this exponent it then takes 1.29 of
either time."""
ATTENTION_RATE_SHARE = 0.93
"""Part of the bandwidth of plain reads at which decode attention reads cached K and V."""
PROMPT_RATE_SHARE = 0.9
"""Part of the GEMM rate at which whole layers of many tokens are computed, all their kernels included."""
DECODE_RATE_SHARE = 0.3
"""Part of the device's memory bandwidth at which coded weights are read, and decoded ones written."""
CODES_RATE_SHARE, CODES_BY_COLUMN_RATE_SHARE = 0.9, 0.35
"""The same of codes with scales; the second, where the scale of each column is found by itself."""
FEW_ROWS_RATE_SHARE = 0.5
"""Products of few rows with codes as they lie take as long as reading the decoded weights at this part of the device's
memory bandwidth: it is the instructions for each weight that take the time."""
LAUNCHES, PROMPT_LAUNCHES = 30, 90
"""Small kernels that take the host as long as one layer of one mini-batch; the second, with prompts in it."""
BOUNDARY_SECONDS, REQUEST_SECONDS = 1e-3, 20e-6
"""Host time between two steps, in all and for each request."""
HOP_SECONDS, HANDOVER_SECONDS = 0.25e-3, 0.08e-3
"""For each mini-batch of a layer, where weights stream: host time beside that of its compute, and time of the bus.
Where none stream, one thread launches all."""
LOADS_BANDWIDTH = 169e9
"""What the host's memory gives to all GPUs that load at once. To be fitted: the sum of what each of four loads."""
GATHER_BANDWIDTH = 187.5e9
"""What a GPU gets from the others over NVLink, where nobody has measured it: layers are whole at each of four GPUs at
250 GB/s then. Calibration measures it where there are several."""
