// What the kernels take of the standard library, for NVRTC, which has none: lopt/kernels/nvrtc.py gives it to the compiler in
// place of each header that they include.
#pragma once

using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long;  // as in the structs that the host fills, on Linux
using uint64_t = unsigned long;
using uintptr_t = unsigned long;
static_assert(sizeof(int64_t) == 8, "the structs in csrc/api/structs.h");

#ifndef NAN
#define NAN __int_as_float(0x7fffffff)
#endif

namespace std {

using ::memcpy;
using ::size_t;

template <class A, class B>
constexpr bool is_same_v = false;
template <class A>
constexpr bool is_same_v<A, A> = true;

template <bool kCondition, class A, class B>
struct conditional {
  using type = A;
};
template <class A, class B>
struct conditional<false, A, B> {
  using type = B;
};
template <bool kCondition, class A, class B>
using conditional_t = typename conditional<kCondition, A, B>::type;

template <class T, T... kValues>
struct integer_sequence {};
template <int kCount, int... kValues>
struct integers_to : integers_to<kCount - 1, kCount - 1, kValues...> {};
template <int... kValues>
struct integers_to<0, kValues...> {
  using type = integer_sequence<int, kValues...>;
};
template <class T, T kCount>  // of int
using make_integer_sequence = typename integers_to<kCount>::type;

}  // namespace std
