"""What a decode loop does between the steps of the decoder. MAX's operations for it are small, but each of them is a
kernel that takes as long to compile as one of ours, and a start of it at every step."""

from max.gpu.host import DeviceContext

import extensibility
from extensibility import InputTensor, OutputTensor

from .pointers import Numbers, Stored, numbers, stored
from .tiles import WIDTH


@no_inline
def embed[
    dtype: DType, weight_dtype: DType
](x: Stored[dtype], token: Stored[weight_dtype], position: Numbers, n_state: Int):
    """Writes the sum of two rows, which fill vectors."""
    for i in range(0, n_state, WIDTH):
        var sum = token.unsafe_load[width=WIDTH](i).cast[DType.float32]() + position.unsafe_load[width=WIDTH](i)
        x.unsafe_store(i, sum.cast[dtype]())


@extensibility.register("maxwhisper.embed")
struct Embed:
    """Embeds the last tokens of texts, and proposals behind them.

    x: (batch, token, state). offsets: (batch,), how many tokens of each text come before.
    tokens: (batch, token). lengths: (batch,), of the texts with the first of the tokens.
    token_embedding: (vocab, state). positional_embedding: (position, state).
    """

    @staticmethod
    def execute(
        x: OutputTensor[rank=3, ...],
        offsets: OutputTensor[dtype=DType.int64, rank=1, ...],
        tokens: InputTensor[dtype=DType.int64, rank=2, ...],
        lengths: InputTensor[dtype=DType.int64, rank=1, ...],
        token_embedding: InputTensor[rank=2, ...],
        positional_embedding: InputTensor[dtype=DType.float32, rank=2, ...],
        ctx: DeviceContext,
    ) raises:
        var n_token, n_state = x.dim_size(1), x.dim_size(2)
        for text in range(x.dim_size(0)):
            var offset = lengths.unsafe_ptr()[unsafe_offset=text] - 1
            offsets.unsafe_ptr()[unsafe_offset=text] = offset
            for row in range(text * n_token, (text + 1) * n_token):
                var token = Int(tokens.unsafe_ptr()[unsafe_offset=row])
                var position = Int(offset) + row - text * n_token
                if not 0 <= token < token_embedding.dim_size(0) or not 0 <= position < positional_embedding.dim_size(0):
                    raise Error("maxwhisper.embed: no such token, or a text that is too long")
                embed(
                    stored[x.dtype](x).unsafe_offset(row * n_state),
                    stored[token_embedding.dtype](token_embedding).unsafe_offset(token * n_state),
                    numbers(positional_embedding).unsafe_offset(position * n_state),
                    n_state,
                )


@extensibility.register("maxwhisper.goes_on")
struct GoesOn:
    """Finds whether there is another round of steps.

    goes_on: (1,), whether every text may have as many more tokens as a round is worth, and the credit is not used up.
    new_credit: (1,), the credit with what the round gave, less what it is worth for each text that went on.
    left: (1,), how many more tokens every text may have that has not ended. credit: (1,).
    before, lengths: (batch,), of the texts before and after the round.
    worth: (1,), in tokens of a text.
    """

    @staticmethod
    def execute(
        goes_on: OutputTensor[dtype=DType.bool, rank=1, ...],
        new_credit: OutputTensor[dtype=DType.int64, rank=1, ...],
        left: InputTensor[dtype=DType.int64, rank=1, ...],
        credit: InputTensor[dtype=DType.int64, rank=1, ...],
        before: InputTensor[dtype=DType.int64, rank=1, ...],
        lengths: InputTensor[dtype=DType.int64, rank=1, ...],
        worth: InputTensor[dtype=DType.int64, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        var total, price = credit.unsafe_ptr()[unsafe_offset=0], worth.unsafe_ptr()[unsafe_offset=0]
        for text in range(before.dim_size(0)):
            var given = lengths.unsafe_ptr()[unsafe_offset=text] - before.unsafe_ptr()[unsafe_offset=text]
            if given > 0:
                total += given - price
        new_credit.unsafe_ptr()[unsafe_offset=0] = total
        goes_on.unsafe_ptr()[unsafe_offset=0] = total >= 0 and left.unsafe_ptr()[unsafe_offset=0] >= price
