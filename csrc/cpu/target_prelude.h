// Everything a target file needs from outside, included before its target region opens: standard headers stay compiled
// for the baseline, so that no inline function of theirs can leak a newer instruction into ordinary code.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>

#include "cpu/kernel_table.h"
#include "cpu/params.h"
#include "cpu/scratch.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif
