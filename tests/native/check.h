// The smallest test harness that is still pleasant: TEST registers, CHECK reports both sides and goes on.
#pragma once

#include <functional>
#include <iostream>
#include <sstream>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace check {

struct Test {
    std::string name;
    std::function<void()> body;
};

inline std::vector<Test>& tests() {
    static std::vector<Test> all;
    return all;
}

inline int& num_failures() {
    static int count = 0;
    return count;
}

inline int& num_checks() {
    static int count = 0;
    return count;
}

struct Register {
    Register(const char* name, std::function<void()> body) { tests().push_back({name, std::move(body)}); }
};

template <typename T>
std::string show(const T& value) {
    std::ostringstream out;
    if constexpr (requires { value.begin(); } && !std::is_convertible_v<T, std::string>) {
        out << "[";
        for (const auto& item : value) {
            out << " " << show(item);
        }
        out << " ]";
    } else if constexpr (requires { out << value; }) {
        out << value;
    } else {
        out << "<value>";
    }
    return out.str();
}

inline void report(bool ok, const char* file, int line, const std::string& text) {
    ++num_checks();
    if (!ok) {
        ++num_failures();
        std::cerr << file << ":" << line << ": " << text << "\n";
    }
}

template <typename A, typename B>
void equal(const A& a, const B& b, const char* file, int line, const char* text) {
    report(a == b, file, line, std::string(text) + ": " + show(a) + " against " + show(b));
}

// The type of the exception, and a part of its message: an error that names nothing helps nobody.
template <typename Error, typename Fn>
void throws(Fn&& fn, const std::string& part, const char* file, int line, const char* text) {
    try {
        fn();
    } catch (const Error& error) {
        const std::string message = error.what();
        report(message.find(part) != std::string::npos, file, line,
               std::string(text) + ": the message '" + message + "' does not say '" + part + "'");
        return;
    } catch (const std::exception& error) {
        report(false, file, line, std::string(text) + ": another exception: " + error.what());
        return;
    }
    report(false, file, line, std::string(text) + ": no exception");
}

inline int run_all(const std::string& filter) {
    for (const Test& test : tests()) {
        if (test.name.find(filter) == std::string::npos) {
            continue;
        }
        const int failures = num_failures();
        const int checks = num_checks();
        try {
            test.body();
        } catch (const std::exception& error) {
            report(false, test.name.c_str(), 0, std::string("unexpected exception: ") + error.what());
        }
        if (num_checks() == checks) {
            report(false, test.name.c_str(), 0, "the test checked nothing");
        }
        std::cout << (num_failures() == failures ? "ok      " : "FAILED  ") << test.name << "\n";
    }
    std::cout << num_checks() << " checks, " << num_failures() << " failures\n";
    return num_failures() == 0 && num_checks() > 0 ? 0 : 1;
}

}  // namespace check

#define TEST(name)                                                    \
    static void test_##name();                                        \
    static const check::Register register_##name(#name, test_##name); \
    static void test_##name()
#define CHECK(condition) check::report((condition), __FILE__, __LINE__, #condition)
#define CHECK_EQ(a, b) check::equal((a), (b), __FILE__, __LINE__, #a " == " #b)
#define CHECK_THROWS(Error, part, ...) \
    check::throws<Error>([&] { static_cast<void>(__VA_ARGS__); }, part, __FILE__, __LINE__, #__VA_ARGS__)
