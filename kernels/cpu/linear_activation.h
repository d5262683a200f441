// What joins gate and up, for any width. Included inside an anonymous namespace, behind
// linear_formats.h.

// e^x for x in [-87, 88]: 2^n * p(r), x = n ln 2 + r, |r| <= ln 2 / 2; degree 6, relative error
// under 2e-7.
inline __attribute__((always_inline)) F Exp(F x) {
  x = Isa::Max(Isa::Min(x, Isa::Broadcast(88.0f)), Isa::Broadcast(-87.0f));
  const F n = Isa::Round(Isa::Mul(x, Isa::Broadcast(1.44269504f)));
  F r = Isa::Fma(n, Isa::Broadcast(-0.693359375f), x);
  r = Isa::Fma(n, Isa::Broadcast(2.12194440e-4f), r);
  F p = Isa::Broadcast(1.0f / 720);
  p = Isa::Fma(p, r, Isa::Broadcast(1.0f / 120));
  p = Isa::Fma(p, r, Isa::Broadcast(1.0f / 24));
  p = Isa::Fma(p, r, Isa::Broadcast(1.0f / 6));
  p = Isa::Fma(p, r, Isa::Broadcast(0.5f));
  p = Isa::Fma(p, r, Isa::Broadcast(1.0f));
  p = Isa::Fma(p, r, Isa::Broadcast(1.0f));
  const I power = Isa::Shl32(Isa::Add32(Isa::ToInt(n), Isa::Set32(127)), 23);
  return Isa::Mul(p, Isa::AsFloat(power));
}

// The Activations of kernels/activation.h.
template <Activation kActivation>
inline __attribute__((always_inline)) F GatedOf(F g, F u) {
  const F one = Isa::Broadcast(1.0f);
  if constexpr (kActivation == Activation::kGeGlu) {
    const F slope =
        Isa::Fma(Isa::Mul(g, g), Isa::Broadcast(-kGeluCubic), Isa::Broadcast(-kGeluLinear));
    return Isa::Mul(Isa::Div(g, Isa::Fma(one, one, Exp(Isa::Mul(g, slope)))), u);
  }
  if constexpr (kActivation == Activation::kSwiGlu) {
    return Isa::Mul(Isa::Div(g, Isa::Fma(one, one, Exp(Isa::Mul(g, Isa::Broadcast(-1.0f))))), u);
  }
  const F most = Isa::Broadcast(kSwiGluLimit), least = Isa::Broadcast(-kSwiGluLimit);
  g = Isa::Min(g, most);
  u = Isa::Max(Isa::Min(u, most), least);
  g = Isa::Div(g, Isa::Fma(one, one, Exp(Isa::Mul(g, Isa::Broadcast(-kSwiGluAlpha)))));
  return Isa::Fma(g, u, g);
}
