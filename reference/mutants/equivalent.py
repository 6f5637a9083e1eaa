"""Mutants that nothing could see, each with the reason."""

EQUIVALENT = {
    (
        "kernels/linear.mojo",
        "ceildiv(ceildiv(n_out, n_task), COLUMNS) * COLUMNS",
        "ceildiv(ceildiv(n_out, n_task), COLUMNS) + COLUMNS",
    ): "tasks are smaller, and as many more: all columns are computed",
    (
        "kernels/linear.mojo",
        "number * share",
        "number",
    ): "a task computes the columns of those before it too, to the same values",
    (
        "kernels/attention.mojo",
        "values.cast[Self.dtype]().cast[DType.float32]()",
        "values",
    ): "in float32, in which mutants are tried, a cast to the cache's dtype changes nothing",
    (
        "kernels/team.mojo",
        "n_share < most and n_share * n_piece % n_thread != 0 and n_share * n_piece < ENOUGH * n_thread",
        "n_share < most and n_share * n_piece % n_thread != 0 and n_share",
    ): "work is cut into more shares, which takes longer and computes the same",
    (
        "kernels/team.mojo",
        "n_share < most and n_share * n_piece % n_thread != 0 and n_share * n_piece < ENOUGH * n_thread",
        "n_share < most and n_share * n_piece % n_thread == 0 and n_share * n_piece < ENOUGH * n_thread",
    ): "work is cut into fewer shares, or into more, which takes longer and computes the same",
    **{
        (file, "release()", "pass"): "AMX's registers are saved with the thread until the next task, which takes longer"
        for file in ("kernels/amx_attention.mojo", "kernels/convolution.mojo")
    },
    (
        "decoding/module_cache.py",
        "kv.contiguous()",
        "kv",
    ): "what a graph reads is made contiguous before it is called",
    (
        "decoding/speculative.py",
        "self.n_text_ctx + 1",
        "self.n_text_ctx - 1",
    ): "the last two tokens of a full context are found by steps, and are the same",
    (
        "network/log_mel.py",
        "n_frames - 1",
        "n_frames",
    ): "one frame more is cut out of the samples than outputs are computed of",
}
"""By file, code before and code after."""
