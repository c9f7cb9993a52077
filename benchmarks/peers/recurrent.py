"""torch's own recurrent layers, which call oneDNN or their own loops in C++."""

from collections.abc import Callable, Mapping

from torch import Tensor, nn


class TorchLayer(nn.Module):
    """One layer of nn.RNN, nn.GRU or nn.LSTM, batch first, h of every step alone returned."""

    def __init__(self, ours: nn.Module, kind: type[nn.RNNBase], **options: str) -> None:
        super().__init__()
        self.layer = kind(ours.input_size, ours.hidden_size, bias=ours.bias, batch_first=True, **options)
        self.layer.load_state_dict({f"{name}_l0": value for name, value in ours.state_dict().items()})

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


PEERS: Mapping[str, Mapping[str, Callable[[nn.Module], nn.Module]]] = {
    "gru_cell": {"nn.GRU": lambda ours: TorchLayer(ours, nn.GRU)},
    "lstm_cell": {"nn.LSTM": lambda ours: TorchLayer(ours, nn.LSTM)},
    "rnn_cell": {"nn.RNN": lambda ours: TorchLayer(ours, nn.RNN, nonlinearity=ours.nonlinearity)},
}
