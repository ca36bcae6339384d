#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <cstdio>

// Each line goes out when it is whole, into a pipe too, so that who waits sees how far the tests are.
static const int by_lines = std::setvbuf(stdout, nullptr, _IOLBF, BUFSIZ);
