// Vectors of one instruction set, and how a token's features become a row of them.
//
// Included inside an anonymous namespace and after every standard header: nothing compiled here may be shared by the
// linker with code for a lesser CPU.

template <class T>
struct Simd {
  static constexpr int N = DRL_FAST_VECTOR_BYTES / int(sizeof(T));
  typedef T V __attribute__((vector_size(DRL_FAST_VECTOR_BYTES)));
  typedef IntOf<T> I __attribute__((vector_size(DRL_FAST_VECTOR_BYTES)));
  static inline __attribute__((always_inline)) V load(const T* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static inline __attribute__((always_inline)) I load(const IntOf<T>* p) {
    I v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  template <class X, class P>
  static inline __attribute__((always_inline)) void store(P* p, X v) {
    __builtin_memcpy(p, &v, sizeof v);
  }
  static inline __attribute__((always_inline)) V broadcast(T x) { return x - V{}; }
  static inline __attribute__((always_inline)) I broadcast_int(IntOf<T> x) { return x - I{}; }
  static inline __attribute__((always_inline)) T sum(V v) {
    T s = 0;
    for (int i = 0; i < N; i++) s += v[i];
    return s;
  }
};

template <class T>
T dot(const T* a, const T* b, int64_t padded_dim) {
  using S = Simd<T>;
  typename S::V acc = {};
  for (int64_t k = 0; k < padded_dim; k += S::N) acc += S::load(a + k) * S::load(b + k);
  return S::sum(acc);
}

template <class T, class From>
void convert_row(const char* from, T* to, int64_t n) {
  const From* p = reinterpret_cast<const From*>(from);
  for (int64_t k = 0; k < n; k++) to[k] = static_cast<T>(p[k]);
}

template <class T, class To>
void store_row(const T* from, char* to, int64_t n) {
  To* p = reinterpret_cast<To*>(to);
  for (int64_t k = 0; k < n; k++) p[k] = static_cast<To>(from[k]);
}

constexpr double kNormEps = 1e-12;

// One token's features in T, normalised if wanted, zeros up to the padded width.
template <class T>
void load_row(const Tokens<T>& side, int64_t token, T* out, T* inverse_norm) {
  const char* from = side.row[token];
  switch (side.dtype) {
    case Dtype::f32: convert_row<T, float>(from, out, side.dim); break;
    case Dtype::f64: convert_row<T, double>(from, out, side.dim); break;
    case Dtype::f16: convert_row<T, Half>(from, out, side.dim); break;
    case Dtype::bf16: convert_row<T, BFloat16>(from, out, side.dim); break;
  }
  const int64_t width = padded(side.dim);
  for (int64_t k = side.dim; k < width; k++) out[k] = 0;
  T inverse = 1;
  if (side.normalize) {
    const T norm = __builtin_sqrt(dot(out, out, width));
    inverse = norm <= T(kNormEps) ? T(0) : 1 / norm;
    for (int64_t k = 0; k < width; k++) out[k] *= inverse;
  }
  if (inverse_norm) *inverse_norm = inverse;
}

// The gradient of a unit token, through its normalisation (row = the unit token), out in the features' dtype.
template <class T>
void store_gradient(const Tokens<T>& side, T* grad, const T* row, T inverse_norm, char* out) {
  const int64_t width = padded(side.dim);
  if (side.normalize) {
    const T along = inverse_norm == 0 ? T(0) : dot(row, grad, width);
    for (int64_t k = 0; k < width; k++) grad[k] = inverse_norm == 0 ? T(0) : (grad[k] - row[k] * along) * inverse_norm;
  }
  switch (side.dtype) {
    case Dtype::f32: store_row<T, float>(grad, out, side.dim); break;
    case Dtype::f64: store_row<T, double>(grad, out, side.dim); break;
    case Dtype::f16: store_row<T, Half>(grad, out, side.dim); break;
    case Dtype::bf16: store_row<T, BFloat16>(grad, out, side.dim); break;
  }
}
