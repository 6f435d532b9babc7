// Elementary functions on Vec. float: relative error below 2 ulp over the whole range, special values as in C; double:
// libm per lane.

// f applied lane by lane through memory: double precision is for checking gradients, not for speed.
template <class F>
inline VecD per_lane(VecD x, F f) {
  alignas(64) double lanes[VecD::kLanes];
  x.store(lanes);
  for (double& lane : lanes) lane = f(lane);
  return VecD::load(lanes);
}

// e^x: x = n ln2 + r with |r| <= ln2/2 (Cody-Waite, ln2 in two parts), e^r by the degree-6 Taylor-minimax polynomial,
// times 2^n.
inline VecF exp(VecF x) {
  const VecF nan_kept = x;
  // 2^129 overflows and 2^-151 underflows whatever r is.
  x = max(min(x, VecF(89.5f)), VecF(-104.5f));
  const VecF n = round_nearest(x * VecF(1.44269504f));
  VecF r = fnma(n, VecF(0.693359375f), x);
  r = fnma(n, VecF(-2.12194440e-4f), r);
  VecF p = fma(r, VecF(1.3888889e-3f), VecF(8.3333333e-3f));
  p = fma(p, r, VecF(4.1666667e-2f));
  p = fma(p, r, VecF(1.6666667e-1f));
  p = fma(p, r, VecF(0.5f));
  p = fma(p, r, VecF(1.0f));
  p = fma(p, r, VecF(1.0f));
  return select(is_nan(nan_kept), nan_kept, scale_by_rounded(p, n));
}
inline VecD exp(VecD x) {
  return per_lane(x, [](double t) { return std::exp(t); });
}
